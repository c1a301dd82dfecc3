"""`python -m lit_vlm` is the command `lit-vlm`."""

from lit_vlm.commands.cli import main

main()
