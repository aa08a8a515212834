"""Token ids in, token ids out: scheduler, KV cache, sampling, runtimes."""
