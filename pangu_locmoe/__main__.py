from pangu_locmoe.cli import main

raise SystemExit(main())
