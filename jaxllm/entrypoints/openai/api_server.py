"""`python -m jaxllm.entrypoints.openai.api_server --model MODEL` is `jaxllm serve MODEL`."""

import sys

from jaxllm.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
