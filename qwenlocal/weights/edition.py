"""What a checkpoint becomes, as a number: raised whenever that changes."""

# What an earlier edition began is not gone on with; what it finished is converted anew from a folder, and said to be of
# another version where it came from a hub. tests/test_convert.py notices when it is to be raised.
EDITION = 1
