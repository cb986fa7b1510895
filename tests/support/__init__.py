"""What tests are made with: small checkpoints, Meta's code as the truth, a slow conversion by hand, planted faults."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
