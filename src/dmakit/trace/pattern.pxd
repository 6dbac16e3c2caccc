cdef enum:
    HEAD = 6
    LOST = 255
    OTHER = 0
    NOTE = 1
    MALFORMED = 2
    RECORD = 3
    STEP = 5
    HOW_NUMBER = 0
    HOW_HEX = 1
    HOW_WORD = 2
    HOW_TEXT = 3
    HOW_LIST = 4
    ENTRY = 1
    RETURN = 2
    TABLE = 512
