"""How long things take a toy worker, in seconds; and how much it does at once."""

from __future__ import annotations

STATS_S = 0.15
LINK_TIMEOUT_S = 5.0
MAX_STEP_TOKENS = 8
"""Few, so that prompts come in several chunks."""

STARTS_S = (0.05, 0.3)
LOADS_S = (0.01, 0.25)
RELOADS_S = 0.002
STANDBY_LOADS_S = (0.05, 0.8)
"""In the background, for the weights of one owner's units."""

GIVE_WAY_S = 0.5
"""As long as the true worker."""

BULK_TURN_S = 0.001
"""How long a portion of delta KV keeps a worker that has no step to do."""
