"""What `lowfat bench` runs: kernels raced against torch, on real layers' shapes, each result judged after it was timed."""
