"""`python -m jaxllm.entrypoints.openai.api_server`, as in vLLM."""
