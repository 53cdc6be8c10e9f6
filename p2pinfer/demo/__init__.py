"""The bundled demo model: a very small Llama that tells short stories.

Nothing heavy is imported here, so that looking up :data:`MODEL_DIR` costs nothing.
"""

from pathlib import Path

MODEL_DIR: Path = Path(__file__).resolve().parent / "model"

__all__ = ["MODEL_DIR"]
