"""Quantized models: conversion from timm models, scales, checkpoints and cost."""
