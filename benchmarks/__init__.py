"""Measurements that are run by hand, such as ``make bench``."""
