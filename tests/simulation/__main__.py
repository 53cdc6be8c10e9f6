"""Run simulations: `bin/simulate`."""

from __future__ import annotations

from tests.simulation.command import main

if __name__ == "__main__":
    main(prog_name="bin/simulate")
