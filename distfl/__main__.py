"""``python -m distfl`` is the ``distfl`` command."""

from distfl.cli import main

raise SystemExit(main())
