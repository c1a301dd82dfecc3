"""Write a sheet of samples: `python -m lit_vlm.worlds.scenes OUT.png`."""

from __future__ import annotations

import argparse

from lit_vlm.worlds.scenes.sheet import sheet


def main() -> None:
    """Read the command line and write the picture."""
    parser = argparse.ArgumentParser(prog="python -m lit_vlm.worlds.scenes", description="Write a sheet of samples.")
    parser.add_argument("out", help="where to write the PNG")
    parser.add_argument("--count", type=int, default=6, help="number of samples (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other samples (%(default)s)")
    arguments = parser.parse_args()
    sheet(arguments.count, arguments.seed).save(arguments.out, format="PNG", optimize=True)


if __name__ == "__main__":
    main()
