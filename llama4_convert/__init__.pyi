from .conversion.convert import convert as convert
from .conversion.convert import plan as plan
from .conversion.explain import explain as explain
from .conversion.to_meta import export as export
from .fitting.fit import fit as fit
from .inspection.inspect import inspect as inspect
from .inspection.verify import verify as verify
from .publishing import card as card
from .publishing import push as push
from .reference.checkpoint import load_reference as load_reference
from .reference.generation import generate as generate
from .samples.synthetic.synth import synth as synth
from .validation.diff import diff as diff
from .validation.validate import validate as validate

__version__: str
