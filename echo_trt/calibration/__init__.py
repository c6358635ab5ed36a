"""What a policy must know of a bundle and of a machine: acceptance, gates, and the cost of passes."""
