"""The cache of responses: an ordinary TFDS dataset of ArrayRecord shards with a manifest."""
