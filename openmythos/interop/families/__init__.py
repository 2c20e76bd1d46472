"""The published families, one file each: names and fields mapped both ways."""
