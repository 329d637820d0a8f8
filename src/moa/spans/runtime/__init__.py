"""Running a model under a plan: attention by masks in prefill, ring caches in decoding."""
