"""Export, its parity check, quantization and timing of deployed models."""
