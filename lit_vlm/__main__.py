"""`python -m lit_vlm` is the command `lit-vlm`."""

from lit_vlm.core.children import die_with_parent

die_with_parent()  # before the imports that take long

from lit_vlm.commands.cli import main  # noqa: E402

main()
