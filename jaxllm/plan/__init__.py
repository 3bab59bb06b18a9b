"""What a model would take and give on chips that need not be there: `jaxllm plan` and `Engine.plan`."""
