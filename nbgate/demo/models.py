"""The models that the demo upstream knows.

What lives here: names and kinds. Imports nothing, so that the configuration
may use it as the default of a demo channel.
"""

KINDS = {
    "gpt-4o": "chat",
    "gpt-4o-mini": "chat",
    "gpt-4-turbo": "chat",
    "gpt-3.5-turbo": "chat",
    "claude-3-5-sonnet": "chat",
    "claude-3-opus": "chat",
    "gpt-3.5-turbo-instruct": "completions",
    "text-embedding-3-small": "embeddings",
    "dall-e-3": "images",
    "omni-moderation-latest": "moderations",
}
MODELS = tuple(KINDS)
