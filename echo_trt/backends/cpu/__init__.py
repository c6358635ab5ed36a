"""The CPU engine: products for a few rows, with the bits of plain decoding at any batch."""
