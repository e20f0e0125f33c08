"""The label-efficiency study: how many labels does pretraining save on my data?"""
