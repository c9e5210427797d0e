"""What can be known about a training before it starts: data as files hold them, models as folders or the hub give them.

A library: nothing here prints. The commands of `sft_plugins.cli` show what it finds.
"""
