"""Hardware for plans: clusters, links, the constants of devices, and this machine as measured."""
