"""The command line: `jaxllm COMMAND ...`, one file a command."""
