"""`python -m kairos` is the `kairos` command."""

from kairos.cli import main

main()
