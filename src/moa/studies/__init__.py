"""Fair comparisons of fine-tuning methods: equal trained parameters, steps and tries; paired statistics."""
