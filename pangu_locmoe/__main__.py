from pangu_locmoe.cli.main import main

raise SystemExit(main())
