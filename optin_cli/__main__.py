from optin_cli.main import main

main()
