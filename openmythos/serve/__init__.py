"""A server that speaks OpenAI's HTTP API, over the engine."""
