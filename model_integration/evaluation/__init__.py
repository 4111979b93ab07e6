"""What `evaluate` is made of.

tasks <- arguments, scoring; reporting
"""
