"""The scoring methods: one class in one file each. `base` says what a method is, `registry` which there are."""
