"""What each loop reads: the reading map on trained models; see README.md."""
