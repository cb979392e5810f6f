"""What travels between ranks: number formats, message layout, codecs and compressed collectives. Knows torch only."""
