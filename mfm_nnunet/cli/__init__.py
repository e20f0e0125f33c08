"""The commands: argparse to settings to one call; heavy imports only inside main()."""
