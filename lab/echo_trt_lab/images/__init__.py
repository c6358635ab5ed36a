"""What makes the pictures of docs/img/: the demo on a terminal, the dashboard."""
