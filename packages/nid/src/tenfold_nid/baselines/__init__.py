"""What the dictionary is compared with (section 8): one network a signal, learned starts, linear dictionaries,
classics.
"""
