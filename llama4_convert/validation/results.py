"""What `validate` and `diff` return: the keys of their `--json`, in its order, each with what it says.

A result that `validate --json` printed is read back by `quant.typed.decode(value, Validation, where)`. Keys that the first
versions did not print have defaults. Nothing here imports torch or numpy, so that a card made of a saved result starts fast.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType, field

from llama4_convert.checkpoints.manifest import DroppedKey
from quant.typed import Finite

# What a number is beside its type; `decode` checks it.
Count = Annotated[int, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
Error = Annotated[float, Meta(ge=0, le=1e300)]
Logit = Annotated[float, Meta(ge=-4e38, le=4e38)]  # of a float32
Metric = Annotated[str, Meta(pattern=r"^(top1_agreement|kl_mean|kl_median|kl_p999|nmse|max_abs_diff|cosine)\Z")]


class SchemeLoss(Struct, frozen=True, kw_only=True):
    """What quantizing to one scheme cost the matrices that it holds."""

    matrices: Count
    """how many"""
    relative_mse_mean: Error | None = None
    """squared error over the squared weights, the mean of the matrices; null if not finite"""
    relative_mse_largest: Error | None = None
    """that of the worst matrix; null if not finite"""
    worst: str = ""
    """the key of that matrix"""


class TensorFault(Struct, frozen=True, kw_only=True):
    """A tensor that is not the reference's, or a module that computes otherwise though no tensor differs."""

    layer: Count | None
    """of the text model or, where `module` begins so, of the vision tower; null outside layers"""
    module: str
    """the name without the layer: `feed_forward.experts.3.gate`"""
    tensor: str | None
    """the key in Transformers' fused form; null if no tensor is to blame"""
    cause: str
    """how it is wrong, in words"""
    kind: str | None = None
    """the cause in a word (transposed, permuted, missing ...), null where nothing fits"""


class FieldFault(Struct, frozen=True, kw_only=True):
    """A field of the configuration, or of a small file beside it, that contradicts the reference."""

    field: str
    """by its name in config.json"""
    expected: Any
    """what the reference says"""
    found: Any
    """what the candidate says"""
    matters_from: int | None = None
    """tokens of a prompt from which on the field changes a logit; null: none does"""
    matters: bool | None = None
    """whether one of these prompts does"""


class ForcedRouting(Struct, frozen=True, kw_only=True):
    """Metrics of the logits with the reference's choice of experts forced on the candidate; each as in `Validation`."""

    top1_agreement: Share | None = None
    """share of positions, without near-ties, with the same likeliest token"""
    near_ties: Count | None = None
    """positions set aside there"""
    kl_mean: Finite | None = None
    """divergence, nats a token"""
    kl_median: Finite | None = None
    """of one position"""
    kl_p999: Finite | None = None
    """what one position in 1,000 exceeds"""
    nmse: Error | None = None
    """squared difference of the logits over their squares"""
    max_abs_diff: Error | None = None
    """of a logit"""
    cosine: Finite | None = None
    """of the two models' logits at a position, the mean"""


class LayerErrors(Struct, frozen=True, kw_only=True):
    """How far a layer's output lies from the reference's."""

    layer: Count
    """counted from 0"""
    nmse_local: Error | None = None
    """normalized squared error with the reference's input; null between two of Transformers"""
    nmse_propagated: Error | None = None
    """normalized squared error with each model's own input"""
    router_agreement: Share | None = None
    """share of tokens that go to the same experts; null of a dense layer"""


class StageErrors(Struct, frozen=True, kw_only=True):
    """How far a stage of the vision tower lies from the reference's."""

    stage: str
    """`vision.embed`, `vision.layers.0` ..., `vision.adapter`, `vision.projector`"""
    nmse_local: Error | None = None
    """as of a layer"""
    nmse_propagated: Error | None = None
    """as of a layer"""


class ModuleErrors(Struct, frozen=True, kw_only=True):
    """The modules of one layer, each on the reference's input."""

    stage: str
    """`layers.3`"""
    errors: dict[str, Error | None]
    """module -> normalized squared error, in the order in which they compute"""


class Histogram(Struct, frozen=True, kw_only=True):
    """Positions by their divergence."""

    edges: list[Finite]
    """nats, rising"""
    counts: list[Count]
    """positions between each two edges"""
    below: Count
    """positions below the first edge"""

    def __post_init__(self) -> None:
        edges = self.edges
        if len(edges) != len(self.counts) + 1 or edges[0] <= 0 or any(a >= b for a, b in pairwise(edges)):
            raise ValueError("edges must rise from above 0 and be one more than counts")


class RoutingLoad(Struct, frozen=True, kw_only=True):
    """Tokens that the reference's routers send to each expert."""

    layers: list[Count]
    """those with experts"""
    tokens: list[list[Count]]
    """a row a layer, a column an expert"""


class ExpertErrors(Struct, frozen=True, kw_only=True):
    """What quantizing cost each expert."""

    layers: list[Count]
    """those with quantized experts"""
    relative_mse: list[list[Error | None]]
    """the mean of an expert's matrices: a row a layer, a column an expert; null where none is quantized"""


class Pictures(Struct, frozen=True, kw_only=True):
    """Numbers that only the HTML report draws. The first three are not there where the candidate does not run."""

    kl_histogram: Histogram | UnsetType = UNSET
    """divergence of the positions"""
    logit_sample: list[tuple[Logit, Logit]] | UnsetType = UNSET
    """[reference, candidate] of logits drawn with a fixed seed"""
    routing_load: RoutingLoad | UnsetType = UNSET
    """tokens by expert"""
    quantization_error: ExpertErrors | None = None
    """relative squared error by expert; null where none is quantized"""


class Validation(Struct, frozen=True, kw_only=True):
    """What `validate` found: of DST, the candidate, beside SRC, its reference."""

    passed: bool
    """the verdict"""
    path: str
    """DST"""
    reference: str = ""
    """SRC"""
    version: str = ""
    """of this tool"""
    command: str = ""
    """the command line that repeats this"""
    runner: str
    """what ran DST"""
    reference_runner: str = "llama4"
    """what ran SRC"""
    dtype: str
    """that both computed in"""
    kind: str = "exact"
    """whose limits hold: `exact`, or the coarsest scheme that quantized DST and not SRC"""
    config_differences: list[FieldFault]
    """`[{field, expected, found, matters_from, matters}]`, by the names of config.json: `matters_from` the tokens of a prompt
    from which on the field changes a logit (null: none does), `matters` whether one of these prompts does"""
    weights_not_compared: str | None = None
    """why not; null where they were"""
    tensors_compared: Count
    """how many"""
    tensors_quantized: dict[str, SchemeLoss]
    """`{scheme: {matrices, relative_mse_mean, relative_mse_largest, worst}}`"""
    tensors_different: list[TensorFault]
    """`[{layer, module, tensor, cause, kind}]`, in model order: `kind` is the cause in a word (transposed, permuted, missing
    ...), null where nothing fits"""
    tensors_unexpected: list[str] = field(default_factory=list)
    """names that no Llama 4 has"""
    tokens: Count = 0
    """positions compared"""
    top1_agreement: Share | None = None
    """share of positions, without near-ties, with the same likeliest token"""
    near_ties: Count | None = None
    """positions set aside there, whose two likeliest tokens rounding may exchange"""
    kl_mean: Finite | None = None
    """divergence, nats a token"""
    kl_median: Finite | None = None
    """of one position"""
    kl_p999: Finite | None = None
    """what one position in 1,000 exceeds"""
    nmse: Error | None = None
    """squared difference of the logits over their squares"""
    max_abs_diff: Error | None = None
    """of a logit"""
    cosine: Finite | None = None
    """of the two models' logits at a position, the mean"""
    perplexity_reference: Finite | None = None
    """of the prompts"""
    perplexity_reference_error: Finite | None = None
    """its standard error"""
    perplexity_candidate: Finite | None = None
    """of the prompts"""
    perplexity_candidate_error: Finite | None = None
    """its standard error"""
    perplexity_ratio: Finite | None = None
    """the candidate's over the reference's"""
    perplexity_ratio_error: Finite | None = None
    """its standard error"""
    gates: dict[Metric, Finite] = field(default_factory=dict)
    """metric -> limit"""
    gates_failed: list[Metric]
    """metrics beyond"""
    forced_routing: ForcedRouting | None = None
    """metrics with the reference's choice of experts forced on DST; null where none can be"""
    layers: list[LayerErrors] = field(default_factory=list)
    """`[{layer, nmse_local, nmse_propagated, router_agreement}]`; `nmse_local` null between two of Transformers"""
    vision: list[StageErrors] = field(default_factory=list)
    """`[{stage, nmse_local, nmse_propagated}]`"""
    modules: ModuleErrors | None = None
    """of the first layer that strays: `{stage, errors: {module: nmse}}`; else null"""
    first_divergence: TensorFault | None = None
    """null or `{layer, module, tensor, cause, kind}`"""
    candidate_failure: str | None = None
    """why DST does not run; else null"""
    pictures: Pictures = field(default_factory=Pictures)
    """for the HTML report: `{kl_histogram: {edges, counts, below}, logit_sample: [[reference, candidate]], routing_load: {layers,
    tokens}, quantization_error: {layers, relative_mse}}`; the first three are not there where DST does not run"""


class FieldDifference(Struct, frozen=True, kw_only=True):
    """A field of which two checkpoints say different things."""

    field: str
    """by its name in config.json"""
    a: Any
    """what A says"""
    b: Any
    """what B says"""


class TensorDifference(Struct, frozen=True, kw_only=True):
    """A tensor that both checkpoints have, with other numbers."""

    name: str
    """the key in Transformers' fused form"""
    module: str | None
    """the name without the layer, with the expert; null of a tensor that no Llama 4 has"""
    max_abs_diff: Error | None
    """of a number; null where shapes differ or a number is NaN or infinite"""
    cause: str
    """how it differs, in words"""
    kind: str | None
    """the cause in a word, null where none fits"""


class RoundedTensors(Struct, frozen=True, kw_only=True):
    """Tensors of two dtypes, which were compared after rounding."""

    a: str
    """dtype in A"""
    b: str
    """dtype in B"""
    tensors: int
    """how many"""


class Diff(Struct, frozen=True, kw_only=True):
    """What `diff` found between two checkpoints, neither of which is right."""

    equal: bool
    """whether no tensor, no field and no name differs"""
    a: str
    """A as it was given"""
    b: str
    """B as it was given"""
    config_differences: list[FieldDifference]
    """`[{field, a, b}]`, by the names of config.json"""
    tensors_compared: Count
    """tensors that both have; each matrix of an expert counts"""
    different: list[TensorDifference]
    """`[{name, module, max_abs_diff, cause, kind}]`: the key in Transformers' fused form, and with `module` the expert;
    `max_abs_diff` of a number is null where shapes differ or a number is NaN or infinite; `kind` is the cause in a word, null
    where none fits"""
    reference: Literal["a", "b"]
    """`a` or `b`: the side that the words of a cause take as right"""
    only_in_a: list[str]
    """keys of what B lacks"""
    only_in_b: list[str]
    """keys of what A lacks"""
    dropped: list[DroppedKey]
    """`[{name, why}]`: those of the two lists that `convert` drops; they decide nothing"""
    quantized: dict[str, SchemeLoss]
    """`{scheme: {matrices, relative_mse_mean, relative_mse_largest, worst}}`"""
    rounded: list[RoundedTensors]
    """`[{a, b, tensors}]`: how many tensors are of two dtypes, compared after rounding"""
    warnings: list[str]
    """what a user should know of the files that were read"""
