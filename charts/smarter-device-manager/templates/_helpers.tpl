{{/* The labels by which the DaemonSet knows its pods. */}}
{{- define "smarter-device-manager.selector" -}}
app.kubernetes.io/name: {{ .Values.application.appName }}
{{- end -}}

{{/* The labels of every object. */}}
{{- define "smarter-device-manager.labels" -}}
{{ include "smarter-device-manager.selector" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end -}}
