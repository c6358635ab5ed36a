"""Training an EAGLE-3 head: shards of text, the target's features, the unrolled loss, the loop, the export."""
