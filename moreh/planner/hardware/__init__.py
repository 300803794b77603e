"""What plans run on: clusters and links, the time model of a device with its constants, and this machine, measured."""
