# Every right that is granted stands in this file, and in the list in infra/dataflow/README.md. No keys are made.

# Runs the jobs.
resource "google_service_account" "worker" {
  account_id   = "${var.name}-worker"
  display_name = "Braid: Dataflow workers"

  depends_on = [google_project_service.needed]
}

# Builds the images, in Cloud Build.
resource "google_service_account" "builder" {
  account_id   = "${var.name}-builder"
  display_name = "Braid: image builds"

  depends_on = [google_project_service.needed]
}

resource "google_project_iam_member" "worker" {
  for_each = toset([
    "roles/dataflow.worker",
    "roles/logging.logWriter",
    "roles/monitoring.metricWriter",
  ])

  project = var.project
  role    = each.value
  member  = google_service_account.worker.member
}

resource "google_storage_bucket_iam_member" "worker_store" {
  bucket = google_storage_bucket.store.name
  role   = "roles/storage.objectAdmin"
  member = google_service_account.worker.member
}

resource "google_storage_bucket_iam_member" "worker_temp" {
  bucket = google_storage_bucket.temp.name
  role   = "roles/storage.objectAdmin"
  member = google_service_account.worker.member
}

# Beam looks at the bucket itself before it stages a job, here as the launcher of a flex template: storage.buckets.get, which
# objectAdmin has not.
resource "google_storage_bucket_iam_member" "worker_temp_bucket" {
  bucket = google_storage_bucket.temp.name
  role   = "roles/storage.legacyBucketReader"
  member = google_service_account.worker.member
}

resource "google_storage_bucket_iam_member" "worker_source" {
  for_each = var.source_buckets

  bucket = each.value
  role   = "roles/storage.objectViewer"
  member = google_service_account.worker.member
}

resource "google_artifact_registry_repository_iam_member" "worker_images" {
  repository = google_artifact_registry_repository.images.name
  location   = google_artifact_registry_repository.images.location
  role       = "roles/artifactregistry.reader"
  member     = google_service_account.worker.member
}

resource "google_project_iam_member" "submitter" {
  for_each = var.submitters

  project = var.project
  role    = "roles/dataflow.developer"
  member  = each.value
}

# To let a job run as the worker's account; of that account alone, not of the project's others.
resource "google_service_account_iam_member" "submitter_worker" {
  for_each = var.submitters

  service_account_id = google_service_account.worker.name
  role               = "roles/iam.serviceAccountUser"
  member             = each.value
}

resource "google_storage_bucket_iam_member" "submitter_store" {
  for_each = var.submitters

  bucket = google_storage_bucket.store.name
  role   = "roles/storage.objectAdmin"
  member = each.value
}

resource "google_storage_bucket_iam_member" "submitter_temp" {
  for_each = var.submitters

  bucket = google_storage_bucket.temp.name
  role   = "roles/storage.objectAdmin"
  member = each.value
}

# As worker_temp_bucket, where a person submits; `gcloud builds submit` looks at the bucket too.
resource "google_storage_bucket_iam_member" "submitter_temp_bucket" {
  for_each = var.submitters

  bucket = google_storage_bucket.temp.name
  role   = "roles/storage.legacyBucketReader"
  member = each.value
}

# Planning reads the manifest where it is.
resource "google_storage_bucket_iam_member" "submitter_source" {
  for_each = {
    for pair in setproduct(var.submitters, var.source_buckets) : join(" ", pair) => { member = pair[0], bucket = pair[1] }
  }

  bucket = each.value.bucket
  role   = "roles/storage.objectViewer"
  member = each.value.member
}

resource "google_storage_bucket_iam_member" "reader_store" {
  for_each = var.readers

  bucket = google_storage_bucket.store.name
  role   = "roles/storage.objectViewer"
  member = each.value
}

resource "google_artifact_registry_repository_iam_member" "builder_images" {
  repository = google_artifact_registry_repository.images.name
  location   = google_artifact_registry_repository.images.location
  role       = "roles/artifactregistry.writer"
  member     = google_service_account.builder.member
}

resource "google_storage_bucket_iam_member" "builder_temp" {
  bucket = google_storage_bucket.temp.name
  role   = "roles/storage.objectViewer"
  member = google_service_account.builder.member
}

resource "google_project_iam_member" "builder" {
  project = var.project
  role    = "roles/logging.logWriter"
  member  = google_service_account.builder.member
}
