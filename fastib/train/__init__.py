"""Training harness: configuration, data, loop, checkpoints and command line. It knows no method by name."""
