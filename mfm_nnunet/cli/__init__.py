"""The commands: parse arguments into settings and make one call; heavy imports only inside main()."""
