"""Make the S3 buckets named on the command line, where they are not there yet.

In: their names; AWS_ENDPOINT_URL and credentials in the environment. Out: the buckets.
"""

import sys

import boto3

s3 = boto3.client("s3")
present = {bucket["Name"] for bucket in s3.list_buckets()["Buckets"]}
for name in sys.argv[1:]:
    if name not in present:
        s3.create_bucket(Bucket=name)
        print(f"made bucket {name}")
