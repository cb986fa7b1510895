"""What tests are made with: small checkpoints, Meta's code as the truth, a slow conversion by hand, planted faults."""

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
# After which what waits is taken to hang. No test asks how long something takes by the clock: other machines are slower, or busy.
HANG_SECONDS = 36_000 if os.environ.get("TORTURE") else 3_600
