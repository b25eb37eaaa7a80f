"""From prompts to scored responses: requests, one stream of shards, passes over them, scores."""
