"""Serving mixtures in engines that hold their weights fixed: see `moa.serving.packing` and `moa.serving.vllm`."""
