"""`python -m peso`, and with it `torchrun --nproc-per-node 2 -m peso run …`: the `peso` command."""

from peso.cli.app import main

main()
