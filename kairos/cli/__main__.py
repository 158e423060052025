"""`python -m kairos.cli` is the `kairos` command."""

from kairos.cli import main

main()
