"""Packed rows dealt to several processes."""
